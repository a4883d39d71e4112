"""What each switch of the alignment stages is worth, on toy tasks whose best answer is known."""
