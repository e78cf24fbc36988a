"""Commands in a row: which result is used again, which is made anew, and what each run of them did."""
