"""Text -> corpus: sources, records, chats, noise, tokens, shards."""
