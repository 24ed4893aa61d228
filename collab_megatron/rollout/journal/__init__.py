"""What was sampled and paid for, on disk before it is used."""
