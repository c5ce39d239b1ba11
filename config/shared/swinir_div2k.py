# How SwinIR-light was trained on DIV2K: Adam, 500,000 steps of 32 crops, the rate halved 4 times.
dataset = 'div2k'
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 500000
eval_interval = 5000
flip = True
weight_optimizer = 'adam'
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.0
learning_rate = 2e-4
warmup_iters = 0
milestones = [250000, 400000, 450000, 475000]
grad_clip = 0.0
