"""The zoo: tasks, segments, architectures, the batched trainer, and trained families on disk."""
