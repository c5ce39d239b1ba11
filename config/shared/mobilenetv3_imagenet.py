# How the networks of once-for-all were trained on ImageNet: 2,048 images a step, SGD.
dataset = 'imagenet'
batch_size = 64
gradient_accumulation_steps = 32 # 2,048 images a step
eval_iters = 150
bn_batches = 32 # 2,048 images
flip = True
resized_crop = 0.08
color_jitter = 0.125 # published: brightness 32/255, saturation 0.5
label_smoothing = 0.1
weight_optimizer = 'sgd'
nesterov = True
min_lr = 0.0
weight_decay = 3e-5
warmup_iters = 3103
grad_clip = 0.0
