"""What becomes training data: prompts, answers, curation."""
