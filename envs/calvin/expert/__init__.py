"""The scripted expert: an arm, its skills, the policy that chooses among them, and demonstrations made with it."""
