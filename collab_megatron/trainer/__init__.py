"""What the step loops of train_rl.py and train_sft.py are made of. Runs on trainer ranks."""
