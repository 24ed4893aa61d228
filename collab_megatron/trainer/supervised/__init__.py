"""Supervised training: one loop (loop.py) and one reader of rows (data.py) for SFT (sft.py) and DPO (dpo.py)."""
