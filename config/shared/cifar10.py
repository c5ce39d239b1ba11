# CIFAR-10 with its usual augmentation.
dataset = 'cifar10'
crop = 4
flip = True
