"""Examples: tokenised records with a target mask, and the order in which training meets them."""
