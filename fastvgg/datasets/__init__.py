"""Dataset formats, one per module; none depends on a transform's arithmetic."""
