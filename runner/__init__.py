"""Does what a Plan says, and measures. The only room that imports torch and deepspeed."""
