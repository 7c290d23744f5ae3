"""From a folder of pictures to a trained model or adapter; killed at any moment, it can go on."""
