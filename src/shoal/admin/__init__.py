"""Who may come in and who has to leave: invites, certificates, revocations. Runs where the issuing authority lies."""
