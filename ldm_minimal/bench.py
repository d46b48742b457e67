def minutes_to_expect(device, precision): return "?"
