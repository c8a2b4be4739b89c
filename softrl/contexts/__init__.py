"""What a model reads instead of its whole history: windows with compressed memory, and soft tokens made hard."""
