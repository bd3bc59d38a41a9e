"""What is asked, what this machine can do, and what that makes."""
