"""Bytes on disk: text and JSON, the cache, lazy tensors, the safetensors store, shards, ``hf://`` addresses."""
