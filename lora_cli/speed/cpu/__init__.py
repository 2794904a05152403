"""Operations that pay on a CPU only."""
