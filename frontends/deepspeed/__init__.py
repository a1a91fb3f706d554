"""DeepSpeed's compression configuration: read with its own keys and defaults, and a report on what becomes of each."""
