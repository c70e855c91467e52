"""Starts and stops a private swarm on this machine, as child processes."""
