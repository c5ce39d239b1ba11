# The small MobileNetV3 networks on CIFAR-10, for the search and for what it found.
include('cifar10.py')
batch_size = 64
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.05
min_lr = 0.0
weight_decay = 3e-4
grad_clip = 5.0
