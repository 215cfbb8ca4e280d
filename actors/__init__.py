"""How a turn runs on one device: engine, scheduler, an agent's memory. One Ray actor per device."""
