"""FastMTP: fine-tune one multi-token-prediction head, serve it with speculative decoding, lose no word.

Method: "FastMTP: Accelerating LLM Inference with Enhanced Multi-Token Prediction" (arXiv 2509.18362).
"""

__version__ = "0.2.0"
