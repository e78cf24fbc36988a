"""`python -m fastmtp COMMAND` is `fastmtp COMMAND`."""

from fastmtp.cli import entry

entry()
