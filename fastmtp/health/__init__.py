"""What `fastmtp.doctor` looks at: one generator of lines per question about a folder."""
