"""GPU memory of engines in tests."""

# With the size of the KV cache given, vLLM does not ask how much memory is left: other tests may use the GPU meanwhile.
LITTLE_MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}
