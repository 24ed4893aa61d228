"""Messages between the processes of a run: the trainer-driver protocol, the engine roster, checkpoint folders."""
