# Trains a network that config/search_swinir_samples.py found, on a laptop.
# python train_base.py config/base_swinir_samples.py --arch=out/search_swinir_samples_drnas/arch.json
# python analyze.py --out_dir=out/base_swinir_samples --images=sr_samples
out_dir = 'out/base_swinir_samples'
dataset = 'sr_samples'
batch_size = 4
max_iters = 1000
eval_interval = 250
eval_iters = 4
flip = True
weight_optimizer = 'adam'
beta2 = 0.999
weight_decay = 0.0
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 30
