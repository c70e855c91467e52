"""What keeps a swarm from working on this machine: facts are gathered, checks judge them, nothing is changed."""
