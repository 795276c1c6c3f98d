"""Files: atomic writes, tensor files, state files, JSON lines, the cache directory."""
