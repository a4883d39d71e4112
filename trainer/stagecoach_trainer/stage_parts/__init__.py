"""Parts that several stage kinds share: preparing, training, saving and reporting. None of them is a kind."""
