"""Loss, optimizer, train state, step, loop and checkpoints."""
