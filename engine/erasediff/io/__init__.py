"""Files: atomic writes, files of users, strict JSON, tensor files, state files, JSON lines, the cache directory."""
