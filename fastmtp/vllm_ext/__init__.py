"""A plugin for vLLM (entry point group `vllm.general_plugins`): our folders hand their head the normed state.

The head may also have a draft vocabulary. Two of vLLM's model classes are registered again as subclasses,
which change nothing for other folders. One function of the CPU build is replaced, because sampling with
drafts is wrong there (cpu_sampling.py).

vLLM loads every installed plugin in each of its processes. `python -m fastmtp.serve --engine vllm` sets the
rest up.
"""

POST_NORM_READY = "fastmtp.vllm_ext: the head gets the state after the final norm"
TOKEN_MAP_READY = "fastmtp.vllm_ext: drafts from a token map"
TOKEN_MAP = "fastmtp_token_map"  # the key of --additional-config that holds a map's path


def register() -> None:
    """Put our classes in the places of vLLM's. Names alone: vLLM imports a class when a folder needs it."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    ModelRegistry.register_model("MiMoForCausalLM", "fastmtp.vllm_ext.mimo:MiMoForCausalLM")
    ModelRegistry.register_model("MiMoMTPModel", "fastmtp.vllm_ext.mimo:MiMoMTP")
    if current_platform.is_cpu():
        from fastmtp.vllm_ext import cpu_sampling

        cpu_sampling.repair()
