"""DeepSpeed's compression: its configuration and a report on what becomes of each key, and its old entry points."""
