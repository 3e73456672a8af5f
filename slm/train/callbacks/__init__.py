"""What is done between two steps of a run, a file each."""
