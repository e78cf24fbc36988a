"""File formats: safetensors, GGUF, strict YAML."""
