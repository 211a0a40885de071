"""Settings: the run file (TOML), the machine profile (DeepSpeed JSON), and the rules between them. No torch here."""
