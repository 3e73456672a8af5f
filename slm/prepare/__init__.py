"""Text -> corpus: sources, records, chats, noise, tokens, shards."""

from slm.stage import callable_package

callable_package(__name__)
