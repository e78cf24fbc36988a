"""The head: recursion, losses, masks and MiMo's modules. Every file here travels with an exported checkpoint;
torch and transformers alone.
"""
