"""How a teacher's answers are kept on disk: what is stored of them, and the files that hold it."""
