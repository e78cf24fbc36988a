"""What fastmtp.plan is made of: what a cycle costs on a card, and what drafts are expected to bring."""
