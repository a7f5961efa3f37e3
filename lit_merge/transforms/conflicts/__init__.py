"""What becomes of an element that several tasks claim: by size, sign, competition, variance, overlap or conflict."""
