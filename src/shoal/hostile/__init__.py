"""What strangers and members may throw at a swarm, thrown on purpose: fuzzing, stalling, every route with every key."""
