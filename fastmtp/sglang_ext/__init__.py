"""An external model package for SGLang (SGLANG_EXTERNAL_MODEL_PACKAGE=fastmtp.sglang_ext): MiMoMTP with a
draft vocabulary that follows the requests' languages. `python -m fastmtp.serve --token-maps ...` sets
everything up.
"""
