"""What the processes of a run tell each other: messages, the list of engines, and what a checkpoint folder says."""
