"""What a training run needs: its folder, checkpoints, optimizer, a plan of its cost, and a way to stop it."""
