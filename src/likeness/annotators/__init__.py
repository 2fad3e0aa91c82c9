"""Picture -> condition: what prepares data also serves users, so both see the same drawings and masks."""
