"""The contract on disk: shards, their manifests and hashes, who is at work, windows."""
