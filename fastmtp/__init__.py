"""FastMTP: fine-tune one multi-token-prediction head, serve it with speculative decoding, lose no word.

Method: "FastMTP: Accelerating LLM Inference with Enhanced Multi-Token Prediction" (arXiv 2509.18362).
"""

import time

BEGAN = time.time()  # a command's own start, before it imports what takes seconds
__version__ = "0.2.0"
