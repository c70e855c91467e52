"""A swarm under a virtual clock: the real decisions of swarm/, on machines and links that fail as a seed says."""
