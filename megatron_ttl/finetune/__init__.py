"""Fine-tune for classification: Table 5 of TeenyTinyLlama, with splits that nobody can peep into."""
